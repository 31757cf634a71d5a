"""What scores look like, what is kept of a dropped token, which layers follow the question, which choices matter."""
