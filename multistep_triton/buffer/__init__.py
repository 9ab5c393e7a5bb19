"""The classes and parts that ``NStepReplayBuffer`` is built of: a torchrl buffer whose frames lie in order of time."""
