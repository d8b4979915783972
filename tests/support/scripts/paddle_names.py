"""In the toolchain of Paddle: what a model calls its tensors, read by Paddle Inference alone, without our package.

python scripts/paddle_names.py INFERENCE_MODEL
"""

import json
import sys

from paddle import inference

folder = sys.argv[1]
config = inference.Config(folder + "/model.json", folder + "/model.pdiparams")
config.disable_glog_info()
predictor = inference.create_predictor(config)
print(json.dumps([predictor.get_input_names(), predictor.get_output_names()]))
