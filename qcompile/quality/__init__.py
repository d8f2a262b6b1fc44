"""How good a model is: likelihood, distance from the float model, the layers that suffer most."""
