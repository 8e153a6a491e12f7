"""The model. In: config.json and headers. Out: modules without weights, tensor names, data of each family, and the classes that
transformers lacks."""
