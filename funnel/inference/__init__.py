"""Inference with a trained model, from Python or on files.

classifier = Classifier.load("runs/sst2-2,2,2-seed0")
classifier("a gorgeous , witty film")                     # Prediction(label='positive', probability=0.98, ...)
"""
