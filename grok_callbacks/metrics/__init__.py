"""Every measure as a ``torchmetrics.Metric``, thin over :mod:`grok_callbacks.functional`."""
