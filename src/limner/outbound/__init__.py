"""What the service may reach: URLs of pictures, webhooks."""
