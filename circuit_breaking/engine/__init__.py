"""The edge-masked transformer: one weight on every causal edge, exact, forward and backward.

First file to read: `reference`, the plain definition; then `transformer`."""
