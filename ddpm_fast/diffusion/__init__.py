"""The mathematics: schedules, timesteps, parameterizations, the forward process, likelihood."""
