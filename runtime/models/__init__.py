"""The four networks in torch. Parameter names equal the canonical checkpoint keys."""
