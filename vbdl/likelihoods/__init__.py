"""How outputs become p(y | x): scored in training, averaged in prediction, split into aleatoric and epistemic."""
