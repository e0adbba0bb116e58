"""Documents of benchmarks for readers: one HTML page, or Markdown."""
