"""The surfaces: REST and SSE, GraphQL, and the protocols of other clients."""
