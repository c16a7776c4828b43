"""Models optimized for a CPU: in float32 by packed products, and in int8."""
