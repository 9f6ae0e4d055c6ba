"""What Rotunda is measured against: servers that people would use instead, each in a process of its own."""
