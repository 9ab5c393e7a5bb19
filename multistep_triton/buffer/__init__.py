"""The classes that ``NStepReplayBuffer`` is built of, and their parts: a torchrl buffer that keeps frames in order."""
