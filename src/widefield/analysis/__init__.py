"""What a model looks at. Every function leaves the model as it found it."""

from widefield.analysis.routing import Routing, routing_weights

__all__ = ["Routing", "routing_weights"]
