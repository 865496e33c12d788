"""gtflops in the loops that people already have."""
