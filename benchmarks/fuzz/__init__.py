"""`python -m benchmarks fuzz`: damaged and hostile files for everything in examples/vit_ssl that reads a file."""
