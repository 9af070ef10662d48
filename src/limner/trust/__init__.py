"""Trust in pictures: what is refused before and after it is drawn, and where a picture says that it comes from."""
