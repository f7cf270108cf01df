#define GRANET_WIDTH 4
#define GRANET_MAX_WORD_VECTORS 4
#define GRANET_ISA_NAME "generic"
#include "reduced.inc"

const granet::ReducedKernels& granet::reduced_generic() { return kReduced; }
