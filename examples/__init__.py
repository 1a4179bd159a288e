"""The demo and what it runs: trained networks, rendered text, handwritten digits; `workflows` has more examples."""
