"""What the stages train with: losses, the learner, rewards, the KL controller, PPO's experience."""
