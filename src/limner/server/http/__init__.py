"""What all routes share: settings, the parts of a server, errors as answers, limits of requests."""
