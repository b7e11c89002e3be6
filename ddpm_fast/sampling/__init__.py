"""Step tables, solvers, the reverse step and the samplers that run them."""
