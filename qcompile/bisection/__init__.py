"""Which pass, then which linears, cost the accuracy."""
