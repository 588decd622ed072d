"""What runs a model. `protocol` says what the engine asks of a backend; `host` and `cuda` answer."""
