"""What all routes share: settings, errors as answers, limits of bodies."""
