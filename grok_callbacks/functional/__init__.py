"""Every measure as a pure function of tensors: no state, no Lightning."""
