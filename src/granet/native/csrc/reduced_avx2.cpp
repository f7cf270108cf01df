#define GRANET_WIDTH 8
#define GRANET_MAX_WORD_VECTORS 4
#define GRANET_ISA_NAME "avx2"
#include "reduced.inc"

const granet::ReducedKernels& granet::reduced_avx2() { return kReduced; }
