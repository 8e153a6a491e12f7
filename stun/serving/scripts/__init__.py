"""Programs that run in a runtime's own environment, which need not have this package: REQUEST.json ANSWER.json."""
