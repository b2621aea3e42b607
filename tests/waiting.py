"""What tests of several processes share."""
import time

def wait_for(what, seconds=120):
    "Look again and again until it is so."
    until = time.monotonic()+seconds
    while not (found := what()):
        assert time.monotonic()<until, 'it does not come'
        time.sleep(0.05)
    return found
