"""What scores look like, what is kept of a dropped token, which layers to trust, which choices matter."""
