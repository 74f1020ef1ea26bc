"""The CogVideoX transformer: 2B, 5B, 5B-I2V, 1.5-5B and 1.5-5B-I2V."""
