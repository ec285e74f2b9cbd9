// The passes of a training step, AVX-512.
#include "rows.h"

namespace tutelage {

const Rows* rows512() { return rows_of_this_file(); }

}  // namespace tutelage
