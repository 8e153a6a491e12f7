"""What the network is. In: config.json and headers. Out: modules without weights, tensor names, what a family needs; classes that
transformers lacks."""
