"""What the compiler did to a model, as data, as graphs for other tools, and as one HTML page."""
