"""What is integrated: vector fields over states ``(batch, time, dim)``."""
