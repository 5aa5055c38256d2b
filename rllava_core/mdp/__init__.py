"""The Markov decision process: states, actions, rewards, transitions. Imports no torch.

Vocabulary, in the order in which data flows:

- Example: one entry of a data set: fields to fill a prompt with, images, the answer.
- Observation: what an environment adds to the conversation; with `choices`, the discrete action set.
- Action: what the policy did: tokens and their text, or an index into `choices`.
- Transition: what an environment answers: reward, next observation, terminated, truncated, info.
- Turn: what the policy saw and did, as segments of token ids with images and behaviour log-probs, and the reward.
- Trajectory: the one record that training reads: the turns of an episode, and how it ended.
- Group: the trajectories of one example and seed.
"""
