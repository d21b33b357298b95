"""Who scores answers: exact judges, endpoints, local models."""
