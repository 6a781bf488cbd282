"""Which bits each expert should have: calibration, allocation, trained routers."""
