"""Plain HTTP beside gRPC: what monitoring and orchestrators ask for."""
