"""Access to internals of Keras, KerasHub and the three backends."""
