"""The two sides of the load test: workers without training, and the aggregator that is measured."""
