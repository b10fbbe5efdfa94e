"""A study of masked-language models on equal terms: plan, training, logs, estimates, measurements, report."""
