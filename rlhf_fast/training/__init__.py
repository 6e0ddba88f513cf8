"""The parts of training: losses, the Learner, reward functions, the KL controller, PPO's experience."""
