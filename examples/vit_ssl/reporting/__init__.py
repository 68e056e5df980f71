"""Tables, charts and pages that are made of results."""
