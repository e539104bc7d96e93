"""What a job or an evaluation found, as one HTML page and as JSON."""
