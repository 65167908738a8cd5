"""While a model serves: what its static sites see, whether that is still what calibration saw, and new scales where not."""
