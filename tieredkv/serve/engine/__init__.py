"""One model and the sessions of the films that it was asked about, for many clients."""
