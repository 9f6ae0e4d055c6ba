"""What turns a request into tokens on this machine."""
