"""Self-attention (dense, SLA, SageSLA) and cross-attention."""
