"""How many bits each part of a model should have: calibration, allocation, search, trained bit routers, stand-ins."""
