"""Stands in for the Raspberry Pi's package, whose camera sees the first row of the validation batch."""


class Picamera2:
    def __init__(self, camera_num):
        self.started = False

    def create_preview_configuration(self):
        return {}

    def start(self, config):
        self.started = True

    def capture_metadata(self):
        assert self.started
        return {}
